"""Pipeline parallelism: cut the model into stages, and run microbatches through them by one of torch's schedules.

Called by `apply` (`build.make_stages`, once) and by `ParallelModel` (`run.PipelineRun`, every step). README.md in this
directory shows how a stage runs the model's own forward, and the sequence of calls in a step.

    build      schedules   which stages are on which rank, for which numbers of microbatches; schedule_csv: from a file
               balance     which blocks are in which stage
               partition   leave only a stage's own modules in the model; stage_modules: what replaces the others
               stage       a stage as torch's schedules call it: hidden state in, hidden state or loss out
    run        shape_inference  the first stage finds out what stages exchange (boundary); broadcast: tells the others
               dry_run     one forward of each stage alone: errors, dependencies that are not exchanged; split_backward
               torch_schedule   the adapter to torch's schedules; transfer: pack and unpack what is sent
               tied_weights     weights that two stages hold
"""
