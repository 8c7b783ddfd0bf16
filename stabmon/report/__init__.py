"""Write one self-contained page from a stored analysis.

A page is one HTML file without any request: styles, pictures, data and script are inside. The
verdict in words comes first, then pictures and an interactive map. Verdict, findings and tables are
plain HTML and can be read with JavaScript off.
"""
