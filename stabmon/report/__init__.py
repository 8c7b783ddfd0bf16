"""Write one self-contained page from a stored analysis: words first, then pictures and a map.

A page is one HTML file without any request: styles, pictures, data and script are inside. Verdict,
findings and tables are plain HTML and can be read with JavaScript off.
"""
