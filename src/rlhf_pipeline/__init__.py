"""A staged RLHF pipeline: generate, rank, filter, train. Every file beside this one is a command."""
