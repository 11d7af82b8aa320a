"""azu's wire format, sans-IO: strict CBOR documents, frames, tensors and the messages of each protocol."""
