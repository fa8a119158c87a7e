"""The networks, with the names of published weights; `vision` is for measuring pictures only."""
