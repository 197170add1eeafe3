"""Watch a run: logs, the live view, pictures, the report. Reads records and files, no trainer.

`sinks` and `display` take records while a run goes on, `log` reads them back, `charts` decides what
a picture shows, `plots` and `svg` draw it, `page` writes the report. `spikes` finds losses that
stand out; `inspection` and `inspection_page` show the text of one step by its loss. `markup` holds
what pages have in common, `text` makes text harmless.
"""
