"""Load an exported checkpoint as a stranger would, and report its content.

A program that cannot import q3q:

    python -I -S reload CHECKPOINT INPUTS.safetensors|weights OUT PACKAGES_DIR...

It loads the checkpoint with its format's public loader and writes OUT.json: the loader, the ways in
which activations are rounded, and a `sketch` of each weight by its name on disk. INPUTS holds token
ids [B, T] and, as `plain` and (if activations are rounded) `rounded`, the input [L, B, T, H] of
each block. It runs the ids, and then each block on its given input, so that a difference
stays where it arises. OUT.safetensors gets the `logits` [B, T, V] and, for either kind of inputs,
the result of `run`. Where the public loader needs a GPU, the tensors are unpacked here, by code
written from the format's definition, and transformers runs the result. If GPTQModel is installed,
OUT also has its logits for its formats, as `public`; what it does not load is left out.

Where a public loader reads the checkpoint, OUT.json also says what that took: `use` has the peak
memory and the speed of a short generation, on the CPU and on a GPU if one is visible.

With `weights` in place of a file, it runs nothing and needs memory for one weight at a
time: it unpacks each weight here and writes OUT.json only.

The forward runs in float32 whatever the weights' dtype, so that different logits mean different
weights. EXIT_SHORTAGE (memory or disk ran short) says nothing about the checkpoint.
"""
