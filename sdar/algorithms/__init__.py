"""Pure torch and numpy: what is optimised and on which shapes. Does no I/O, knows no service, reads
no file.
"""
