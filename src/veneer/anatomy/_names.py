"""Names that projections have in published models, for where nothing but a name can be asked."""

ATTENTION = {
    "query": (
        "q_proj",
        "query",
        "q",
        "q_lin",
        "query_proj",
        "to_q",
        "wq",
        "w_q",
        "q_linear",
        "linear_q",
        "Wq",
    ),
    "key": ("k_proj", "key", "k", "k_lin", "key_proj", "to_k", "wk", "w_k", "k_linear", "linear_k", "Wk"),
    "value": (
        "v_proj",
        "value",
        "v",
        "v_lin",
        "value_proj",
        "to_v",
        "wv",
        "w_v",
        "v_linear",
        "linear_v",
        "Wv",
    ),
    "output": (
        "o_proj",
        "out_proj",
        "o",
        "out_lin",
        "to_out",
        "wo",
        "Wo",
        "c_proj",
        "dense",
        "proj",
        "out",
        "linear_out",
    ),
}
FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj", "in_proj_weight", "attn_qkv")
MLP = {
    "gate": ("gate_proj", "wi_0", "w1", "gate", "linear_v", "Wg"),
    "up": ("up_proj", "fc1", "wi", "wi_1", "lin1", "c_fc", "dense_h_to_4h", "linear1", "w3", "up", "fc_in",
    "Wi",
           "intermediate_dense"),
    "down": ("down_proj", "fc2", "wo", "lin2", "c_proj", "dense_4h_to_h", "linear2", "w2", "fc_out",
    "down", "Wo",
             "output_dense"),
}  # fmt: skip
FUSED_MLP = ("gate_up_proj", "fused_gate_up", "Wgu")
HEADS = ("lm_head", "classifier", "score", "cls", "head", "fc", "qa_outputs", "embed_out",
    "output_projection", "proj_out",
         "vocab_projector", "classification_head", "output_layer", "logits")  # fmt: skip
