"""Language-model endpoints that speak one protocol."""
