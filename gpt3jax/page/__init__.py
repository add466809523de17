"""The look that all HTML pages share: style, elements, tables, bars, charts. Imports no JAX.

A page is one file that needs nothing else: no network, no library. Its charts are SVG, which is
there without JavaScript and in print; the script beside them only shows values under the cursor.
"""
