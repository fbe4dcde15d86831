"""Pre-train language models: titan-model, titan-parallel, titan-data and titan-ckpt assembled into one command.

A run, from the command line to its files. Every box is a module of this package:

    titan-train --config NAME|FILE --section.key value
        |
       cli ------ settings      default < file < flag, into one frozen config.Config; mistakes explains errors
        |
        |-------- launch        with --nproc N: starts N processes, each of which runs cli again
        |
       run ------ distributed   process group; rank, world size, device
        |
        |-------- check         do config, model and layout fit?  -> Checked (plan, degrees, options, tokenizer)
        |
        |-------- assembly      Checked -> Run: model laid out (titan_model, titan_parallel), optimizer,
        |                       loader (data, titan_data), checkpointer (titan_ckpt)
        |
        |-------- loop          for each step: batch -> forward and backward -> clip -> optimizer and schedule
        |           |
        |           |---------- metrics     StepRecord -> StepMetrics -> terminal, metrics.jsonl, TensorBoard
        |           |---------- checkpointer.save every checkpoint.interval steps, at the end, on a signal (signals)
        |
        '-------- console       what is printed at the start and at the end, with a sample (sampling)

Importing this package does not import torch. `titan_train.run.run` trains.
"""

from titan_train.config import Config
from titan_train.errors import ConfigError, ExitCode, TrainingError
from titan_train.settings import Settings, config_names, load

__all__ = ["Config", "ConfigError", "ExitCode", "Settings", "TrainingError", "config_names", "load"]
