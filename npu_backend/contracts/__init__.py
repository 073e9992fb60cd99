"""What each operator accepts; one file per operator. What it refuses is refused with the vendor's key phrases.

Of what the vendor's host code lets through but its kernels misread only the safe subset is accepted; those refusals say
"unsafe". What the vendor accepts and the CPU kernels do not compute is refused as "not implemented in the emulation".
The vendor raises RuntimeError, so do these.
"""
