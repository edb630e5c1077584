"""Outgrowing the tiny GPT: what the same code needs on real models and machines. Nothing here is imported by minilora; transformers is an extra.

    loading   text   saving    a transformers model, its tokens, a folder of its own          serving    one batch, many adapters
    parallel                   several processes                                              doctor     the usual confusions, from evidence
"""
