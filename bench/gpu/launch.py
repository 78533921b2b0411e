"""Every kernel once, forward and backward, at tiny shapes: what a memory checker watches. python -m bench.gpu.launch"""

import torch

from bench import kernel_rows


def main():
    device = kernel_rows.device()
    for case in kernel_rows.all_cases(small=True):
        inputs = case.make(torch.Generator(device).manual_seed(0), device)
        case.ways["ours"](*inputs)()
        if device == "cuda":
            torch.cuda.synchronize()
        print(case.kernel, case.name, flush=True)


if __name__ == "__main__":
    main()
