// Search from the disk. Browsers run no Worker from file://, so its script runs in a hidden frame
// with a worker's two functions: messages in, messages out.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inner = this.frame.contentWindow
      this.relay = event => {
        if (event.source !== this.inner) return
        const message = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      }
      window.addEventListener("message", this.relay)
      const page = this.frame.contentDocument
      page.open()
      page.write(
        "<script>postMessage = data => parent.postMessage(data, '*')<\/script>" +
        `<script src="${url}"><\/script>`
      )
      page.close()
    }
    postMessage(data) {
      const send = () => this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data }))
      if (this.frame.contentDocument.readyState === "complete") setTimeout(send)
      else this.frame.addEventListener("load", send, { once: true })
    }
    terminate() {
      window.removeEventListener("message", this.relay)
      this.frame.remove()
    }
  }
}
