"""The rooms: what would corrupt results silently if two copies of it drifted. No commands, no flags, no Config."""
