"""Pipeline parallelism: cut the model into stages, and run microbatches through them by a schedule of torch's.

Called by `apply` (to build the stages) and by `ParallelModel` (to run a step).
Hands on the losses of a step on the last stage; stages run the model's own forward and exchange one tensor.
"""
