"""Time, bandwidth and correctness of the collectives, in the manner of NVIDIA's nccl-tests, through cupy or gloo."""
