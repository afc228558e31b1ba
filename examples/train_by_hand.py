"""Train an adapter in a loop of one's own: lorica lays it on the model, the rest is plain torch."""

import sys

import torch

from lorica import create_adapter, extract, fuse, inject, load_base, remove, target_modules, unfuse

num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60

base = load_base("demo", kind="causal")
text = "a passage to be learned by heart, word for word, as an adapter easily does"
tokens = torch.tensor([base.tokenizer(text)["input_ids"]])

live = inject(base.model, create_adapter(base.model, target_modules(base, "all-linear"), rank=4, alpha=8))
optimizer = torch.optim.AdamW(live.trainable().values(), lr=1e-2)
for step in range(num_steps):
    loss = base.model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

adapter = extract(live)
remove(live)  # the base is itself again, bit for bit
pristine = fuse(base.model, adapter)  # W + s·B·A, for inference without an adapter
print(f"fused: loss {base.model(input_ids=tokens, labels=tokens).loss.item():.3f}")
unfuse(base.model, pristine)
print(f"{adapter.num_parameters():,} numbers hold what was learned, of norm {adapter.norm():.2f}")
