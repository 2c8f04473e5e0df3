"""Trained models as folders that others can use: what is written.

export  writes the folder     model_card  its README.md     __main__  the command
utils.training.shared_folder reads the folder: scripts take it wherever they take a checkpoint.
"""
