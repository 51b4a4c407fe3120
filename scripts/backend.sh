#!/usr/bin/env bash
# Prints the back end that `generate` can use with this Python: vllm, or transformers where vLLM isn't installed.
set -euo pipefail
"${1:-python}" - <<'END' 2>/dev/null || echo vllm
from importlib.util import find_spec

print("transformers" if find_spec("transformers") and not find_spec("vllm") else "vllm")
END
