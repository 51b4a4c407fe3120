"""Launched by test_train_launches: 50 updates of a tiny bf16 Llama at lr 3e-7; prints which share of its float32 master
weights moved, and which share of them moved as far as bf16 can tell."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_pipeline.core.training.distributed import Engine, clean_exit, load_dtype, make_accelerator, one_update
from rlhf_pipeline.core.training.optim import make_optimizer

accelerator = make_accelerator(max_grad_norm=None)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, use_cache=False
)
model = LlamaForCausalLM(config).to(load_dtype(accelerator))
assert next(model.parameters()).dtype == torch.bfloat16
optimizer = make_optimizer(model.parameters(), lr=3e-7)
engine = Engine(accelerator, *accelerator.prepare(model, optimizer))


def master() -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return torch.cat([safe_get_full_fp32_param(p).flatten().clone() for p in engine.model.parameters()])


before = master()
generator = torch.Generator().manual_seed(accelerator.process_index)
for _ in range(50):
    ids = torch.randint(0, 256, (2, 16), generator=generator)
    one_update(engine, [ids], lambda ids: engine.model(input_ids=ids, labels=ids).loss / 2, max_grad_norm=None)
after = master()
if accelerator.is_main_process:
    moved = (before != after).float().mean().item()
    in_bf16 = (before.bfloat16() != after.bfloat16()).float().mean().item()
    print(moved, in_bf16, flush=True)
clean_exit(accelerator)
