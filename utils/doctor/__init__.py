"""Checks of the environment and of a folder of slices: `python -m utils.doctor`.

findings     what was found, and how to fix it     settings  the flags of the command
environment  packages, device, disk                data      slices, tiles, gene files     __main__  the command
The checks call the functions that the scripts read with. Nothing is written, nothing is downloaded.
"""
