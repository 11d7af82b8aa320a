"""Whose money it is: a wallet signs a text, and gets API keys that may spend what the wallet paid in.

Pure: what is signed (`message`), which texts are ours and still good (`challenge`), what a key is and may do (`keys`),
and how often an address may ask (`rate`). The tables are in `store`, signatures are checked by `azu.payments.wallets`.
"""
