"""Ready-made tokens on disk: titan-data's own token shards, and other people's token files."""
