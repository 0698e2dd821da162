"""Reporting: the files of a compare folder as a page, in words, tables and charts."""
