"""Compare tinyti with diffusers' example script.  This is a program, not a test.

    python -m tests.bench step                                                 # the miniature, batch 4
    python -m tests.bench step --batch 1 4 8 16 --vectors 1 4                  # how it grows
    python -m tests.bench step --weights sd15 --size 256 512 --batch 1 --rounds 3 --block 1
    python -m tests.bench alone --weights sd15 --size 256 --batch 1 --rounds 3 --block 2
    python -m tests.bench quality --sets cat dog --seeds 0 1
    python -m tests.bench dreambench --data dreambooth --weights weights/sd15 --clip … --dino …

The sides take turns, so that other load on the machine affects both; the medians of all turns are compared.
`--weights` is a model folder as diffusers saves it, or sd15 or sd21 for random weights of that size, which
are written to a temporary folder (4.3 and 5.2 GB).  On a GPU: `--device cuda --precision bf16`.
"""
