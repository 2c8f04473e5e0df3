"""Trained models as folders that others can use: the folder that is written, its card, upload and download.

export         writes the folder     model_card  its README.md     hub  huggingface_hub     __main__  the command
Reading the folder is training.shared_folder's: scripts take it wherever they take a checkpoint.
"""
