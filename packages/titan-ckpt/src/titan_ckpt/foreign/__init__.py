"""What other programs write, and what they read: Hugging Face folders, DCP, files of torch.save, Meta's shards."""
