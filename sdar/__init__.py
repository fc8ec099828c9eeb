"""What the services share: contracts, algorithms, runtime and the command line. Imports no service
(only `sdar.cli` does).
"""
