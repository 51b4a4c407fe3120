"""What train, sft and reward are made of: pairs, losses, passes, the engine, checkpoints."""
