"""What is optimised and on which shapes, in pure torch and numpy: no I/O, no service, no file.

Each folder is a registry (`sdar.contracts.registry`): whoever adds a gate, a correction, a loss
term, a shaping of the advantages, a reducer of the gap or a schedule adds one file to it.
"""
