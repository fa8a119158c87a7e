"""The networks, with the names of published weights; `vision` measures pictures and is not needed to learn a word."""
