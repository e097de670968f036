"""The flags that recipes share, one dataclass a part.

Each is prefixed by its part, because TRL's own configs already own short names such as ``top_k`` and ``temperature``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rag_rl.errors import ConfigError


@dataclass
class RunArguments:
    """What a run writes."""

    save_merged: bool = field(
        default=False,
        metadata={"help": "also merge LoRA weights into the base and save whole weights, not an adapter"},
    )
    report_examples: int = field(default=20, metadata={"help": "questions shown in report.html, with both answers"})
    headroom_samples: int = field(
        default=0,
        metadata={
            "help": "before training, sample this many answers to each of 200 held-out questions and record pass@n "
            "and the share of groups without variance; 0 leaves it out"
        },
    )


@dataclass
class DataArguments:
    """Corpus and questions. Paths may begin with ``${data}`` (the environment variable RAG_RL_DATA) or ``${tiny}``."""

    data_corpus: str = field(
        default="",
        metadata={"help": "JSONL, BEIR folder, folder of .txt/.md, .csv, native multi-hop rows, or hub:<dataset id>"},
    )
    data_text_columns: list[str] = field(
        default_factory=list, metadata={"help": "text columns of a CSV or Hub corpus"}
    )
    data_title_column: str | None = field(default=None, metadata={"help": "title column of a CSV or Hub corpus"})
    data_id_column: str | None = field(default=None, metadata={"help": "id column; without one, rows are numbered"})
    data_train: str = field(default="", metadata={"help": "questions to train on"})
    data_eval: str | None = field(
        default=None, metadata={"help": "held-out questions; without it they are split off data_train"}
    )
    data_train_qrels: str | None = field(
        default=None,
        metadata={"help": "relevance judgements of data_train: a TSV file, or the name of a BEIR folder's split"},
    )
    data_eval_qrels: str | None = field(default=None, metadata={"help": "the same of data_eval"})
    data_eval_size: int = field(default=500, metadata={"help": "held-out questions, at most"})
    data_folds: int | None = field(
        default=None, metadata={"help": "cross-validation: cut data_train into so many folds and hold out data_fold"}
    )
    data_fold: int = field(default=0, metadata={"help": "the fold that is held out, from 0"})
    data_train_size: int | None = field(default=None, metadata={"help": "questions to train on, at most"})
    data_chunk_tokens: int | None = field(
        default=None, metadata={"help": "cut documents into chunks of this many tokens; without it they stay whole"}
    )
    data_chunk_overlap: int = field(default=32, metadata={"help": "tokens that consecutive chunks share"})


@dataclass
class RetrieverArguments:
    """Where passages come from."""

    retriever_name: str = field(
        default="dense",
        metadata={
            "help": "dense, http (servers started by rag-rl serve), none (ask without passages), or "
            "package.module:attribute"
        },
    )
    retriever_encoder: str = field(
        default="", metadata={"help": "sentence-transformers model: Hub id, folder, or python:package:function"}
    )
    retriever_backend: Literal["faiss", "chroma"] = field(default="faiss", metadata={"help": "vector store"})
    retriever_index_path: str | None = field(
        default=None,
        metadata={"help": "index folder; by default under RAG_RL_CACHE or ~/.cache/rag-rl, built if missing"},
    )
    retriever_index: Literal["flat", "hnsw", "ivf_pq"] = field(
        default="flat",
        metadata={
            "help": "faiss: flat compares with every passage and is exact; hnsw walks a graph; ivf_pq looks into "
            "lists of compressed vectors. docs/scaling.md says when; an index that exists must be of this kind"
        },
    )
    retriever_index_hnsw_m: int | None = field(
        default=None, metadata={"help": "hnsw: links a passage; default 32, which is 272 bytes a passage"}
    )
    retriever_index_ef_construction: int | None = field(
        default=None, metadata={"help": "hnsw: candidates while the graph is built; default 4 times the links"}
    )
    retriever_index_ef_search: int | None = field(
        default=None,
        metadata={"help": "hnsw: candidates of a search, may change at any time; default 128, 256 from 10 million on"},
    )
    retriever_index_nlist: int | None = field(
        default=None, metadata={"help": "ivf_pq: lists; default 4 times the square root of the number of passages"}
    )
    retriever_index_pq_m: int | None = field(
        default=None,
        metadata={"help": "ivf_pq: pieces of a vector, a divisor of its width; default width / 4, 96 at most"},
    )
    retriever_index_pq_bits: int | None = field(
        default=None, metadata={"help": "ivf_pq: bits a piece, 4 to 12; default 8, fewer below 9,984 passages"}
    )
    retriever_index_sample: int | None = field(
        default=None, metadata={"help": "ivf_pq: vectors to train from, at most; default 64 a list"}
    )
    retriever_index_nprobe: int | None = field(
        default=None,
        metadata={
            "help": "ivf_pq: lists that a search looks into, may change at any time; default twice the square root of "
            "nlist"
        },
    )
    retriever_index_refine: int | None = field(
        default=None,
        metadata={
            "help": "ivf_pq: so many times top_k are scored again with their vectors, may change at any time; "
            "default 5"
        },
    )
    retriever_chroma_url: str | None = field(
        default=None, metadata={"help": "a Chroma server, as http://host:port; without it Chroma is embedded"}
    )
    retriever_url: list[str] = field(
        default_factory=list,
        metadata={"help": "http: the server, as http://host:port, or several that hold a part of the corpus each"},
    )
    retriever_fingerprint: list[str] = field(
        default_factory=list,
        metadata={"help": "http: fingerprint of the index that each server must serve; by default any"},
    )
    retriever_token_env: str = field(
        default="RAG_RL_RETRIEVER_TOKEN",
        metadata={"help": "http: environment variable with the bearer token, where the servers want one"},
    )
    retriever_timeout_s: float = field(default=60.0, metadata={"help": "http: patience for one request, in seconds"})
    retriever_wait_s: float = field(
        default=120.0,
        metadata={"help": "http: how long a server may load, be restarted or be out of reach, in seconds"},
    )
    retriever_top_k: int = field(default=5, metadata={"help": "passages a question"})
    retriever_pooling: Literal["cls", "mean", "last"] | None = field(
        default=None, metadata={"help": "override the encoder's pooling"}
    )
    retriever_normalize: bool | None = field(default=None, metadata={"help": "override: unit vectors or not"})
    retriever_query_prompt: str | None = field(default=None, metadata={"help": "override the text put before queries"})
    retriever_document_prompt: str | None = field(
        default=None, metadata={"help": "override the text put before documents"}
    )
    retriever_max_length: int | None = field(
        default=None, metadata={"help": "override the encoder's limit, in tokens"}
    )
    retriever_batch_size: int = field(default=32, metadata={"help": "texts a batch when encoding"})
    retriever_dtype: str | None = field(default=None, metadata={"help": "weights of the encoder, e.g. bfloat16"})
    retriever_devices: list[str] = field(default_factory=list, metadata={"help": "devices to encode on, e.g. cuda:0"})
    retriever_reranker: str | None = field(
        default=None,
        metadata={"help": "cross-encoder that orders what was found: Hub id, or a run folder of train_reranker"},
    )
    retriever_candidates: int = field(default=20, metadata={"help": "passages that the reranker orders"})
    retriever_reranker_batch_size: int = field(default=64, metadata={"help": "pairs a batch of the reranker"})
    retriever_shuffled: bool = field(
        default=False, metadata={"help": "control experiment: return other passages than those that were found"}
    )

    def __post_init__(self) -> None:
        if self.retriever_top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {self.retriever_top_k}")
        if self.retriever_index != "flat" and self.retriever_backend != "faiss":
            raise ConfigError(
                f"retriever_index {self.retriever_index} needs retriever_backend faiss, got {self.retriever_backend}"
            )
        if self.retriever_name == "http" and not self.retriever_url:
            raise ConfigError("retriever_name http needs retriever_url, as http://host:port")
        if self.retriever_name in ("dense", "none") and self.retriever_url:
            raise ConfigError(f"retriever_url needs retriever_name http, got {self.retriever_name}")
        if self.retriever_reranker and self.retriever_candidates < self.retriever_top_k:
            raise ConfigError(
                f"retriever_candidates must be at least retriever_top_k ({self.retriever_top_k}), got "
                f"{self.retriever_candidates}"
            )


@dataclass
class GeneratorArguments:
    """How the generator is asked, and how its answers are read."""

    generator_prompt: str = field(
        default="answer", metadata={"help": "name of a packaged prompt, or a text file's path"}
    )
    generator_answer_marker: str = field(
        default="Answer:",
        metadata={"help": "what stands before the answer; empty where the whole reply is the answer"},
    )
    generator_type: Literal["base", "instruct"] = field(
        default="instruct", metadata={"help": "instruct gets chat turns, base plain text"}
    )
    generator_passage_order: Literal["ranked", "reversed", "shuffled"] = field(
        default="ranked",
        metadata={"help": "passages best first, best last, or in an order fixed by the question's id"},
    )
    generator_max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "budget of a prompt; by default what the model's context leaves"}
    )
    generator_eval_batch_size: int = field(default=64, metadata={"help": "answers a batch in evaluation"})


@dataclass
class RewardArguments:
    """What is rewarded. TRL's ``reward_weights`` gives one weight a name; by default format weighs 0.2, the rest 1."""

    reward_names: list[str] = field(
        default_factory=lambda: ["f1", "format"],
        metadata={
            "help": "em, f1, contains_em, format, length, groundedness, citation, judged (by judge_name), "
            "reward_model, constant, or package.module:attribute"
        },
    )
    reward_required: list[str] = field(
        default_factory=list, metadata={"help": "rewards without which a completion is not trained on"}
    )
    reward_length_target: int = field(default=64, metadata={"help": "length: full reward up to this many tokens"})
    reward_unanswerable: Literal["keep", "drop", "abstain"] = field(
        default="keep",
        metadata={"help": "questions whose gold passage was not retrieved: keep, drop, or reward abstaining"},
    )
    reward_model: str | None = field(default=None, metadata={"help": "reward_model: a sequence-classification model"})
    reward_model_template: list[str] = field(
        default_factory=lambda: ["$question", "$answer"],
        metadata={
            "help": "reward_model: the pair of texts that it reads, or one text; with $question, $answer, $passages"
        },
    )
    reward_model_label: int | None = field(
        default=None, metadata={"help": "reward_model: which output of a model with several, from 0"}
    )
    reward_model_max_length: int = field(
        default=512, metadata={"help": "reward_model: tokens that it reads, both texts together; more are cut"}
    )

    def __post_init__(self) -> None:
        if len(self.reward_model_template) not in (1, 2):
            raise ConfigError(f"reward_model_template must be one text or two, got {len(self.reward_model_template)}")


@dataclass
class JudgeArguments:
    """Who judges answers: the held-out ones before and after training and, with the reward judged, all others."""

    judge_name: str | None = field(
        default=None,
        metadata={
            "help": "openai (any endpoint of that protocol, see judge_base_url), gemini, local (a model in this "
            "process), reward_model, oracle (the tiny world's), or package.module:attribute; by default none"
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "openai, gemini: the endpoint's name of it; local, reward_model: Hub id or folder"},
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={
            "help": "openai, gemini: another endpoint, as http://host:port/v1; default OPENAI_BASE_URL or their own"
        },
    )
    judge_api_key_env: str | None = field(
        default=None,
        metadata={
            "help": "environment variable with the key; default OPENAI_API_KEY, for gemini GOOGLE_API_KEY; none is "
            "needed on this machine"
        },
    )
    judge_rubric: str = field(
        default="answer_correctness",
        metadata={"help": "what is asked: a packaged rubric (docs/adapters.md lists them), or a prompt file's path"},
    )
    judge_scale: list[float] = field(
        default_factory=list,
        metadata={"help": "lowest and highest score that the prompt asks for; default the rubric's"},
    )
    judge_graded: bool | None = field(
        default=None, metadata={"help": "whether scores between the two count; default the rubric's"}
    )
    judge_pass_mark: float | None = field(
        default=None, metadata={"help": "score in [0, 1] from which on an answer passes; default the rubric's, or 0.5"}
    )
    judge_temperature: float | None = field(
        default=0.0, metadata={"help": "of the replies; null leaves it to the endpoint, for models that take no other"}
    )
    judge_max_tokens: int | None = field(
        default=None,
        metadata={"help": "budget of a reply, its reasoning included; default openai 1024, gemini 8192, local 256"},
    )
    judge_extra_body: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": 'openai, gemini: more fields of each request, {"reasoning_effort": "low"}'},
    )
    judge_concurrency: int = field(
        default=32, metadata={"help": "questions to the judge at a time, in each process; local: prompts a batch"}
    )
    judge_timeout_s: float = field(default=60.0, metadata={"help": "patience for one request, in seconds"})
    judge_max_retries: int = field(
        default=5, metadata={"help": "repeats of a request after 429, 5xx, a lost connection or a time-out"}
    )
    judge_max_calls: int | None = field(
        default=None, metadata={"help": "requests that a run may make, over all its processes and continuations"}
    )
    judge_max_usd: float | None = field(
        default=None, metadata={"help": "US dollars that a run may cost, by the two prices below"}
    )
    judge_usd_per_million_prompt_tokens: float = field(
        default=0.0, metadata={"help": "price of what the judge reads, for judge_max_usd"}
    )
    judge_usd_per_million_completion_tokens: float = field(
        default=0.0, metadata={"help": "price of what the judge writes, its reasoning included, for judge_max_usd"}
    )
    judge_cache: str | None = field(
        default=None,
        metadata={
            "help": "folder of verdicts that need not be asked for again; default under RAG_RL_CACHE or ~/.cache"
        },
    )
    judge_log: str | None = field(
        default=None, metadata={"help": "JSONL file of all verdicts; default verdicts.jsonl in the run folder"}
    )

    def __post_init__(self) -> None:
        if len(self.judge_scale) not in (0, 2):
            raise ConfigError(f"judge_scale must be the lowest and the highest score, got {self.judge_scale}")
        if self.judge_pass_mark is not None and not 0.0 <= self.judge_pass_mark <= 1.0:
            raise ConfigError(f"judge_pass_mark must lie in [0, 1], got {self.judge_pass_mark}")


@dataclass
class ReaderArguments:
    """Who asks, reads and answers while a retriever is trained; it stays as it is."""

    reader_name: str = field(
        default="decomposition",
        metadata={
            "help": "decomposition (follows the one that comes with a question, a model reads), scripted (follows it, "
            "and reads what is known to be there), react (a model plans and reads), none (one search, scored by "
            "judged documents), or package.module:attribute"
        },
    )
    reader_model: str | None = field(
        default=None, metadata={"help": "the model: Hub id or folder; or its name at reader_base_url"}
    )
    reader_base_url: str | None = field(
        default=None, metadata={"help": "an OpenAI-compatible endpoint; without it the model runs in this process"}
    )
    reader_api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "environment variable that holds the endpoint's key"}
    )
    reader_type: Literal["api", "base", "instruct"] = field(
        default="instruct", metadata={"help": "api and instruct get chat turns, base plain text"}
    )
    reader_prompt: str = field(
        default="answer", metadata={"help": "decomposition: packaged prompt, or a text file's path"}
    )
    reader_answer_marker: str = field(default="Answer:", metadata={"help": "what stands before an answer in a reply"})
    reader_max_new_tokens: int = field(default=128, metadata={"help": "budget of a reply, in tokens"})
    reader_batch_size: int = field(default=64, metadata={"help": "prompts a batch, for a model in this process"})
    reader_max_hops: int = field(default=5, metadata={"help": "most searches a question"})
    reader_history: bool = field(
        default=True, metadata={"help": "the retriever reads the question and the hops so far, not the query alone"}
    )
    reader_follow_up: bool = field(
        default=True,
        metadata={"help": "decomposition: later hops are put as they would be in a conversation ('Who leads it?')"},
    )
    reader_reward: str = field(
        default="f1",
        metadata={
            "help": "f1 of the answer; ndcg, recall, reciprocal_rank of the first list; all_gold_recall over all "
            "hops; constant; or package.module:attribute, called with a trajectory"
        },
    )

    def __post_init__(self) -> None:
        if self.reader_max_hops < 1:
            raise ConfigError(f"reader_max_hops must be at least 1, got {self.reader_max_hops}")


@dataclass
class QueryEncoderArguments:
    """What of the query encoder is trained."""

    retriever_train: Literal["full", "lora", "head"] = field(
        default="full",
        metadata={"help": "all weights; LoRA in all linear layers; or the encoder frozen, with a linear map on top"},
    )
    retriever_lora_r: int = field(default=32, metadata={"help": "lora: rank"})
    retriever_lora_alpha: int = field(default=64, metadata={"help": "lora: scale, times 1 / rank"})
    retriever_state_tokens: int | None = field(
        default=None, metadata={"help": "longest query with its history; by default what the encoder takes"}
    )


@dataclass
class ReasonerArguments:
    """How the multi-hop reasoner works: chains of steps, each a query or the final answer."""

    reasoner_layout: Literal["turn", "chat"] = field(
        default="turn",
        metadata={
            "help": "what the model sees of a chain: turn (one user turn with everything so far, as in the paper) or "
            "chat (a conversation in which documents are user turns)"
        },
    )
    reasoner_type: Literal["base", "instruct"] = field(
        default="instruct", metadata={"help": "instruct gets chat turns, base plain text"}
    )
    reasoner_max_steps: int = field(default=5, metadata={"help": "steps of a chain, the one that answers included"})
    reasoner_max_step_tokens: int = field(default=512, metadata={"help": "budget of a step, in tokens"})
    reasoner_max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "longest prompt of a step; the oldest documents give way, the question never does"},
    )
    reasoner_eval_batch_size: int = field(default=64, metadata={"help": "chains a batch in evaluation"})
    reasoner_baselines: list[str] = field(
        default_factory=lambda: ["one_shot", "no_retrieval"],
        metadata={
            "help": "what the start model is measured against on the same questions: one_shot (as many passages as a "
            "chain sees, at once) and no_retrieval"
        },
    )
    reasoner_baseline_model: str | None = field(
        default=None, metadata={"help": "another model for the baselines, such as a run folder of grpo_generator"}
    )
    reasoner_baseline_top_k: int | None = field(
        default=None,
        metadata={
            "help": "passages of one_shot; default what the longest chain with an answer sees: retriever_top_k times "
            "reasoner_max_steps - 1"
        },
    )
    reasoner_baseline_prompt: str = field(
        default="answer", metadata={"help": "of the baselines: name of a packaged prompt, or a text file's path"}
    )
    reasoner_baseline_closed_prompt: str = field(
        default="answer_closed_book", metadata={"help": "the same without passages, for no_retrieval"}
    )
    reasoner_baseline_marker: str = field(
        default="Answer:", metadata={"help": "what stands before the answer in a reply of the baselines"}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.reasoner_baselines) - {"one_shot", "no_retrieval"})
        if unknown:
            raise ConfigError(f"reasoner_baselines are one_shot and no_retrieval, got {', '.join(unknown)}")
        for name in ("reasoner_max_steps", "reasoner_max_step_tokens", "reasoner_baseline_top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class StepRewardArguments:
    """What a step earns. Whether an answer is right, and how good a step is, the judge says (``judge_name``)."""

    step_reward: str = field(
        default="paper",
        metadata={
            "help": "paper (relevance of the documents, times 1.6 / 0.8 / 0.9 by how the chain ends; the last step "
            "2, 0 or -0.9), outcome_only, process_only, return_to_go, coherence, gold_gain (without a judge), "
            "or constant"
        },
    )
    step_coherence: bool = field(
        default=False,
        metadata={"help": "also judge each analysis of the held-out chains: reasoning_accuracy"},
    )
