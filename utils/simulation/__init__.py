"""Simulated slices with a known truth: the tissue decides the image and the expression.

tissue  cells and regions     image   their H&E image     counts  their expression    files  as Space Ranger writes them
slices  whole cohorts         __main__  the command
"""
