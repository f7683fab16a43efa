"""Rubrics, grades and the graders that give them."""
