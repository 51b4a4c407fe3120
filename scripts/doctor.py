"""What this machine and environment have: the first thing to look at, and to paste, when a run fails."""

from rlhf_pipeline.core.preflight import doctor

if __name__ == "__main__":
    print(*doctor(), sep="\n")
