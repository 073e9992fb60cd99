"""What goes to a backend and comes back, as files (docs/formats.md).

atomic                    files and folders that are whole or not there
latent, case, result      the inputs of attention; what a backend computed of them
note                      why there is no result
checksums, folders        the checksums of a folder; all cases of it, all folders of results
profile, pictures         a precision profile; what commands draw
"""
