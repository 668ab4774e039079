"""What other frameworks and papers call our keys, for the suggestion beside an unknown key."""

# Our key -> its names elsewhere: a name in any section, or a section's with its dot.
SYNONYMS = {
    "mtp.num_nextn_predict_layers": "mtp.depth mtp.depths mtp.d mtp.n mtp.k mtp.heads "
    "mtp.num_heads mtp.n_heads mtp.modules mtp.num_modules num_mtp_modules n_future_tokens "
    "mtp_num_layers num_speculative_tokens mtp.num_predict_tokens num_nextn_predict_modules",
    "mtp.loss_weight": "lambda lam lambda_mtp mtp.weight mtp.scale mtp.alpha mtp.coeff "
    "mtp.coefficient mtp.lambda_weight mtp.loss_scale mtp.loss_coeff loss_scaling_factor "
    "mtp_loss_scaling_factor mtp_loss_weight mtp_lambda",
    "mtp.mode": "mtp.type mtp.kind mtp.head mtp.head_type mtp.method mtp.architecture mtp.enabled",
    "mtp.objective": "mtp.loss mtp.loss_type mtp.loss_fn mtp.objectives",
    "mtp.depth_weights": "mtp.depth_weight mtp.weights mtp.decay mtp.loss_weights mtp.head_weights",
    "mtp.detach": "mtp.stop_gradient mtp.detach_trunk mtp.detach_encoder",
    "optim.lr": "learning_rate max_lr peak_lr max_learning_rate",
    "optim.schedule.warmup": "warmup_steps warmup_ratio warmup_iters warmup_fraction "
    "lr_warmup_steps lr_warmup",
    "optim.schedule.final_ratio": "min_lr lr_min min_lr_ratio end_lr",
    "optim.grad_clip": "max_grad_norm clip_grad clip_grad_norm gradient_clipping max_norm",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "optim.weight_decay": "wd",
    "train.total_tokens": "steps max_steps num_steps total_steps train_steps train_iters max_iters "
    "num_iterations epochs num_epochs num_train_epochs max_tokens num_tokens tokens",
    "train.batch_size": "global_batch_size grad_accum gradient_accumulation "
    "gradient_accumulation_steps grad_acc_steps batch",
    "train.micro_batch_size": "mbs per_device_train_batch_size device_batch_size local_batch_size "
    "micro_batch",
    "train.dtype": "train.precision bf16 fp16 amp mixed_precision torch_dtype param_dtype",
    "train.activation_checkpointing": "gradient_checkpointing recompute recompute_granularity "
    "activation_checkpoint grad_checkpointing",
    "train.bias_update_speed": "bias_update_rate bias_update_factor bias_update_gamma",
    "train.balance_loss_weight": "aux_loss_alpha aux_loss_coeff aux_loss_weight moe_aux_loss_coeff",
    "train.ema_decay": "ema",
    "train.init_from": "pretrained checkpoint_path load_from init_checkpoint",
    "run.seed": "random_seed",
    "run.dir": "output_dir out_dir save_dir log_dir",
    "run.name": "run_name exp_name experiment",
    "data.train": "dataset data_path data.path train_data data.dataset",
    "data.val": "val_data valid_data data.validation data.eval",
    "data.seq_len": "seq_length sequence_length context_length context_len block_size data.length "
    "max_length train.max_seq_len",
    "model.num_hidden_layers": "num_layers n_layers n_layer model.depth model.layers",
    "model.num_attention_heads": "num_heads n_heads n_head model.heads",
    "model.hidden_size": "dim d_model n_embd n_embed embed_dim model.width",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size inter_dim",
    "model.moe_intermediate_size": "moe_inter_dim moe_ffn_hidden_size expert_dim",
    "model.vocab_size": "vocab n_vocab",
    "model.n_routed_experts": "num_experts n_experts num_local_experts num_routed_experts",
    "model.n_shared_experts": "num_shared_experts",
    "model.num_experts_per_tok": "top_k topk moe_top_k moe_router_topk n_activated_experts "
    "num_experts_per_token",
    "model.n_group": "n_expert_groups num_groups",
    "model.topk_group": "n_limited_groups",
    "model.first_k_dense_replace": "n_dense_layers num_dense_layers",
    "model.routed_scaling_factor": "route_scale",
    "model.max_position_embeddings": "max_seq_len max_seq_length n_ctx",
    "model.rope_theta": "rope_base rotary_base",
    "model.rms_norm_eps": "norm_eps layer_norm_eps",
    "model.initializer_range": "init_std initializer_std",
    "parallel.expert_parallel_size": "ep ep_size expert_parallel expert_model_parallel_size",
    "parallel.pipeline_stages": "pp pp_size pipeline_parallel_size pipeline_model_parallel_size",
    "parallel.sequence_parallel_size": "sp cp context_parallel_size sequence_parallel",
    "parallel.zero_stage": "zero zero1 deepspeed.stage",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "checkpoint.resume": "resume_from auto_resume",
    "eval.every": "eval_every eval_interval eval_steps val_every validation_interval",
    "eval.batches": "eval_iters eval_batches val_batches",
    "log.every": "log_every log_interval logging_steps log_freq",
    "log.wandb": "use_wandb wandb_project",
    "log.tensorboard": "use_tensorboard",
}
OURS = {name: key for key, names in SYNONYMS.items() for name in names.split()}


def our_key(key: str) -> str | None:
    """Our key for a dotted one that others use; None: it is not known elsewhere either."""
    section, _, name = key.lower().rpartition(".")
    return OURS.get(f"{section.rpartition('.')[2]}.{name}") or OURS.get(name)
