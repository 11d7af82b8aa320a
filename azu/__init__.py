"""azu: large language models on machines nobody has to rent."""
