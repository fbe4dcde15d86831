"""The driver: assembles the other four packages into a training run."""
