"""What generate is made of: prompts, samplers, responses and their journal."""
