"""The command line: one file per verb, parsing, calling and showing only."""
