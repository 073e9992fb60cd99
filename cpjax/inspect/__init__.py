"""What the real TPU compiler makes of a program for many chips, read from its schedule; no TPU is needed.

    topology     the devices of a topology, by name, in ring order
    programs     the public function, its derivative, and the latent one: shapes instead of arrays
    hlo          the compiled text: computations and their instructions
    schedule     trips and cycles of loops, and of each transfer what runs between its start and its end
    inspection   all of it for one program: compiled, timed, memory per chip
    report       a table and JSON
    draw         a picture of one step

`cpjax inspect` is the command (docs/scale.md). The compiler is libtpu, an extra of the package: `pip install
cpjax[tpu]`.
"""
