"""How cuBLAS sums: set before CUDA starts."""

import os


def keep_sums_whole() -> None:
    """Ask cuBLAS not to split the inner dimension of matrix products, by giving it no workspace for partial sums.

    At the sizes at hand it then adds in ascending order, as the kernels here do, and cached sums have the bits of full
    ones. Where CUDA has started already, or the user has set the variables, nothing changes; results stay exact, since
    they are certified, but a certificate may need a few more iterations.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
