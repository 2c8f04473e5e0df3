"""Results as people read them: tables of metrics and the offline page report.html.

tables      lines of text from the metrics.json of one or several runs     __main__  the command
html        report.html: maps, genes, examples and tables on one page      data      its values and images as text
parts       what both evaluations put on it                                slide_maps  maps of predicted genes
"""
