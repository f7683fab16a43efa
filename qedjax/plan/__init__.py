"""Plans of runs on machines that are not there: what fits, what moves, and how long it takes."""
