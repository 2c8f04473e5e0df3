"""Results as people read them: figures, tables of metrics, AnnData files, and the offline page report.html.

spots      spots of a slice and the small image they are drawn on      spot_maps      maps of genes as figures
tables     lines of text from the metrics.json of runs                 anndata_files  predictions.h5ad
page       report.html: what it holds, written and joined              page_data      values and images as its text
page_parts metrics and retrieval examples on the page                  __main__       the command
explained  what columns and rows mean
page.html, page.css and {page,tables,maps,cards}.js are the page's template. Nothing here computes a metric.
"""
