// Cuts a stream of text into server-sent events: bytes may break anywhere, lines end in LF, CRLF or CR.

const LARGEST_EVENT = 8 * 1024 * 1024;

/** Feed pieces of text; get the `data` of each event that is complete. */
export class EventCutter {
  #rest = [];
  #restLength = 0;
  #data = [];
  #afterReturn = false;

  /** @param {string} text the next piece @returns {string[]} the data of the events that it completes */
  feed(text) {
    const events = [];
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    if (text) this.#afterReturn = text.endsWith("\r");
    let start = 0;
    for (const match of text.matchAll(/\r\n|\n|\r/g)) {
      const line = this.#take(text.slice(start, match.index));
      start = match.index + match[0].length;
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    this.#rest.push(text.slice(start));
    this.#restLength += text.length - start;
    if (this.#restLength > LARGEST_EVENT) throw new RangeError("one event of the stream is larger than 8 MiB");
    return events;
  }

  #take(end) {
    const line = this.#rest.length ? this.#rest.join("") + end : end;
    this.#rest = [];
    this.#restLength = 0;
    return line;
  }
}
