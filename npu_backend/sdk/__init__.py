"""The real torch_npu on a host without CANN: for those who develop npu_backend, not for those who run it.

    python -m npu_backend.sdk install build/torch_npu      the wheel, and stand-ins for the libraries it wants
    python -m npu_backend.sdk signatures WHEEL …           what a wheel declares, read from its files

torch_npu installs anywhere, but does not import without CANN's shared libraries, and then plain `import torch` fails
too. So it is installed apart, and small libraries stand in that have every symbol torch_npu leaves undefined, as a
function that returns 0. No kernel runs with them; but the operators are declared, their schemas and shape inference are
the vendor's own, and CPU kernels registered for them run through the vendor's dispatcher entries.

    wheel.py        download and install, apart from the environment
    cann.py         the stand-in libraries
    signatures.py   schemas from a wheel's files, without importing it
"""
