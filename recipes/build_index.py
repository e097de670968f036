"""Build the index of a corpus once, so that many runs can share it: documents, chunks, vectors, FAISS or Chroma.

Trains: nothing; it makes an index folder for --retriever_index_path of the other recipes.
Data: data_corpus (documents); with data_train (questions with gold_doc_ids[]) a search is measured as well;
    docs/data_formats.md.
Rewards: none.
Needs: tiny runs on 2 CPU cores in seconds; memory does not grow with the corpus, except for retriever_index hnsw and
    ivf_pq and for Chroma's graph (docs/scaling.md). A killed build goes on where it stopped when it is started again.
Paper: none; flat search (retriever_index flat) is exact, a graph (hnsw, Chroma; arXiv 1603.09320) and compressed lists
    (ivf_pq; Jegou et al., TPAMI 2011) are not.
CPU: accelerate launch recipes/build_index.py
One node: python recipes/build_index.py --config NAME --retriever_devices cuda:0 cuda:1
Cluster: no (one process builds an index, on several devices of its node; every node then opens it)
"""

import time
from dataclasses import dataclass, field

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.run import launch, report_index, start_data_run


@dataclass
class IndexArguments:
    """Where the index goes."""

    output_dir: str = field(
        default="", metadata={"help": "index folder, new or of this very index; by default indexes/<config>"}
    )


ARGUMENTS = (IndexArguments, DataArguments, RetrieverArguments)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, index folder
    index_args, data_args, retriever_args = start_data_run(__file__, ARGUMENTS, parent="indexes")

    from rag_rl.config.parts import build_corpus, build_encoder, build_probe, index_settings
    from rag_rl.retrieval import build_index, open_index

    # 2. Data: documents, cut by the encoder's own tokenizer where data_chunk_tokens is set; questions to try a search
    index = index_settings(retriever_args)
    encoder = build_encoder(retriever_args)
    passages = build_corpus(data_args, encoder.model.tokenizer)
    questions = build_probe(data_args)

    # 3. Build: passages and vectors go to disk as they come
    started = time.monotonic()
    build_index(
        passages,
        encoder,
        index_args.output_dir,
        backend=retriever_args.retriever_backend,
        chroma_url=retriever_args.retriever_chroma_url,
        index=index,
    )
    seconds = time.monotonic() - started

    # 4. Open it as every other recipe will: files, encoder and stored probes are checked
    retriever = open_index(index_args.output_dir, encoder, chroma_url=retriever_args.retriever_chroma_url, index=index)

    # 5. No trainer: a search over the questions instead, where their gold documents are known
    # 6. Report
    report_index(retriever, questions, top_k=retriever_args.retriever_top_k, seconds=seconds)


if __name__ == "__main__":
    launch(main)
