"""Tables of word vectors: how they come about, how they are read, shrunk, judged and used.

Public names are in `featherweight.words`; here is one concept a file.
"""
