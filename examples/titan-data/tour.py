# From packages/titan-data/README.md; written by tools/examples.py.

import shlex
import subprocess

# In a training loop

import torch
from titan_data import ByteTokenizer, Loader, StdlibSource

tokenizer = ByteTokenizer()
model = torch.nn.Sequential(torch.nn.Embedding(tokenizer.vocab_size, 64), torch.nn.Linear(64, tokenizer.vocab_size))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

loader = Loader(StdlibSource(), tokenizer, seq_len=256, global_batch_size=8, seed=42)
for batch in loader:
    logits = model(batch["tokens"])  # [B, S, V]
    # Labels are already shifted; cross_entropy ignores -100, the label of tokens that are not scored.
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {loader.step}  loss {loss.item():.3f}")
    if loader.step == 3:
        break

# Resuming on another number of ranks

import json
from titan_data import Distribution

saved = json.dumps(loader.state_dict())  # from any one rank
following = next(loader)  # what the single process would train on next

parts = []
for rank in range(2):  # in a real run: two processes
    half = Distribution(rank, world_size=2)
    resumed = Loader(StdlibSource(), tokenizer, seq_len=256, global_batch_size=8, seed=42, distribution=half)
    resumed.load_state_dict(json.loads(saved))
    parts.append(next(resumed)["tokens"])

assert torch.equal(torch.cat(parts), following["tokens"])
print("two ranks continue with the same tokens")

# Resuming on another number of ranks

from titan_data import DataError, ListSource

before = Loader(ListSource(["one", "two"], "notes"), tokenizer, seq_len=8, global_batch_size=2)
after = Loader(ListSource(["one", "2", "three"], "notes"), tokenizer, seq_len=8, global_batch_size=2)
try:
    after.load_state_dict(before.state_dict())
except DataError as error:
    print(error)
after.load_state_dict(before.state_dict(), allow_changes={"data"})

# Preparing a corpus

subprocess.run(shlex.split('titan-data train-tokenizer stdlib --kind sentencepiece --vocab-size 1000 --max-documents 20 --out tokenizer.model'), check=True)
subprocess.run(shlex.split('titan-data prepare stdlib --tokenizer tokenizer.model --out tokens/stdlib'), check=True)
subprocess.run(shlex.split('titan-data inspect tokens/stdlib --tokenizer tokenizer.model --samples 1'), check=True)
subprocess.run(shlex.split('titan-data verify tokens/stdlib'), check=True)

# Preparing a corpus

subprocess.run(shlex.split('titan-data prepare stdlib --tokenizer bytes --out tokens/parts --part 0/2'), check=True)
subprocess.run(shlex.split('titan-data prepare stdlib --tokenizer bytes --out tokens/parts --part 1/2'), check=True)
subprocess.run(shlex.split('titan-data merge tokens/parts'), check=True)

# Preparing a corpus

from pathlib import Path
from titan_data import TokenShards, load_files, load_tokenizer, prepare, verify_shards

notes = [{"text": f"Note {i}: " + "a few words more. " * (i % 9)} for i in range(300)]
Path("notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))

tokenizer = load_tokenizer("tokenizer.model")
# With workers, the default, this belongs under `if __name__ == "__main__":`.
prepare(load_files("notes.jsonl"), tokenizer, "tokens/notes", workers=0)
assert verify_shards("tokens/notes") == []
print(f"{len(TokenShards('tokens/notes'))} documents, {TokenShards('tokens/notes').tokens} tokens")

# Mixing three sources

from titan_data import IterableSource, MixtureSource, Packing, Phase

code = TokenShards("tokens/stdlib", name="code")
web = load_files("notes.jsonl", name="web")  # tokenized while training
books = IterableSource(lambda: (f"chapter {i}. " + "And then it rained. " * 40 for i in range(50)), "books")

loader = Loader(
    [MixtureSource(code, 0.7), MixtureSource(web, 0.2), MixtureSource(books, 0.1, max_epochs=4)],
    tokenizer,
    seq_len=512,
    global_batch_size=10,
    packing=Packing("best_fit"),
    phases=[Phase(from_step=20, weights={"code": 0.5, "web": 0.5}), Phase(from_step=30, seq_len=1024)],
)
for _ in range(20):
    batch = next(loader)
for name, counts in loader.accounting().items():
    print(f"{name}: {counts['tokens']} tokens of {counts['documents']} documents, epoch {counts['epoch']}")

# Documents to validate with

from titan_data import hold_out

training, held_out = hold_out(web, share=0.05)
validation = Loader(held_out, tokenizer, seq_len=128, global_batch_size=4, shuffle=False)
batches = [next(validation) for _ in range(3)]  # the same on any number of ranks, whatever the training loader does
