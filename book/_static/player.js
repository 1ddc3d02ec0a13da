// Stem player: one playhead for several signals of equal length, which you switch between or mix while they play.
//
// <div class="stems"> has <figure class="player">s, each with a caption and an <audio> whose source is a data: URI; written by
// bsmamba2.teaching.plotting.audio. All signals play at once, and gains decide which of them sound, so that switching
// leaves no gap. Without this script, or where a signal cannot be decoded, the <audio> players stay.
"use strict";

(() => {
  const RATE = 44100, N = 2048, COLUMNS = 480, TOP = 10000, BINS = Math.floor((TOP / RATE) * N), FLOOR = -80;
  // Magma, from quiet to loud: the colours of the book's spectrograms, in light and dark.
  const MAGMA = ["000004", "1c1044", "4f127b", "812581", "b5367a", "e55964", "fb8761", "fec287", "fcfdbf"];
  const STEADY = matchMedia("(prefers-reduced-motion: reduce)");
  let context, active; // the page's AudioContext, made by the first press of a button, and the player that plays

  function add(parent, name, attributes = {}, text = "") {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return parent.appendChild(made);
  }

  // --- spectrogram ---

  const cosines = Float64Array.from({ length: N }, (_, i) => Math.cos((2 * Math.PI * i) / N));
  const sines = Float64Array.from({ length: N }, (_, i) => -Math.sin((2 * Math.PI * i) / N));
  const hann = cosines.map((cosine) => 0.5 - 0.5 * cosine);

  // FFT of N complex numbers, in place.
  function fft(re, im) {
    for (let i = 1, j = 0, bit; i < N; i++) {
      for (bit = N >> 1; j & bit; bit >>= 1) j ^= bit;
      j ^= bit;
      if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
    }
    for (let half = 1; half < N; half *= 2) {
      for (let k = 0; k < half; k++) {
        const c = cosines[(k * N) / 2 / half], s = sines[(k * N) / 2 / half];
        for (let i = k, j = k + half; i < N; i += 2 * half, j += 2 * half) {
          const x = re[j] * c - im[j] * s, y = re[j] * s + im[j] * c;
          re[j] = re[i] - x;
          im[j] = im[i] - y;
          re[i] += x;
          im[i] += y;
        }
      }
    }
  }

  // Power per column and bin, summed over two channels: one transform of left + i · right gives both.
  function spectrogram([left, right]) {
    const power = new Float32Array(COLUMNS * BINS), re = new Float64Array(N), im = new Float64Array(N);
    for (let column = 0; column < COLUMNS; column++) {
      for (let i = 0, n = Math.round((left.length * (column + 0.5)) / COLUMNS - N / 2); i < N; i++, n++) {
        const inside = n >= 0 && n < left.length;
        re[i] = inside ? hann[i] * left[n] : 0;
        im[i] = inside ? hann[i] * right[n] : 0;
      }
      fft(re, im);
      for (let k = 0; k < BINS; k++) {
        const m = (N - k) % N;
        power[column * BINS + k] = re[k] ** 2 + im[k] ** 2 + re[m] ** 2 + im[m] ** 2;
      }
    }
    return power;
  }

  const hues = Uint8ClampedArray.from({ length: 256 * 4 }, (_, i) => {
    const at = (8 * (i >> 2)) / 255, low = Math.min(Math.floor(at), 7), c = i & 3;
    const [from, to] = [low, low + 1].map((stop) => parseInt(MAGMA[stop].slice(2 * c, 2 * c + 2) || "ff", 16));
    return from + (to - from) * (at - low);
  });
  function paint(canvas, power, loudest) {
    const image = new ImageData(COLUMNS, BINS), pixels = new Uint32Array(image.data.buffer), colours = new Uint32Array(hues.buffer);
    for (let column = 0, i = 0; column < COLUMNS; column++) {
      for (let k = 0; k < BINS; k++, i++) {
        const level = 10 * Math.log10(power[i] / loudest + 1e-12);
        pixels[(BINS - 1 - k) * COLUMNS + column] = colours[Math.round(255 * Math.max(1 - level / FLOOR, 0))];
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function largest(arrays) {
    let most = 1e-9;
    for (const array of arrays) for (let i = 0; i < array.length; i++) most = Math.max(most, Math.abs(array[i]));
    return most;
  }

  // --- player ---

  function make(box, index) {
    const labels = [...box.querySelectorAll("figcaption")].map((caption) => caption.textContent);
    const last = Math.min(labels.length, 9);
    let signals = []; // an AudioBuffer, its channels and their power each, once they are decoded
    let duration = 0, loudest = 1, position = 0, begun = 0, voices = [], chosen = 0, decoded, frame;

    const controls = add(box, "div", { class: "controls", role: "group", "aria-label": `Player: ${labels.join(", ")}` });
    const title = add(controls, "p", { class: "title" }), view = add(controls, "div", { class: "view" });
    const canvas = add(view, "canvas", { width: COLUMNS, height: BINS, "aria-hidden": "true" });
    const range = { type: "range", min: 0, max: 1, value: 0, autocomplete: "off" };
    const seek = add(view, "input", { ...range, step: "any", class: "seek", "aria-label": "Position" });
    const bar = add(controls, "div", { class: "bar" }), button = add(bar, "button", { type: "button" }, "Play");
    const clock = add(bar, "span", { class: "clock" }), mixLabel = add(bar, "label");
    const mix = add(mixLabel, "input", { type: "checkbox", autocomplete: "off" });
    mixLabel.append(" Mix");
    const list = add(controls, "fieldset");
    add(list, "legend", {}, "Signals");
    const rows = labels.map((label, i) => {
      const row = add(list, "div", { class: "signal" }), name = add(row, "label");
      const radio = add(name, "input", { type: "radio", name: `stems-${index}`, autocomplete: "off" });
      name.append(` ${i + 1} · ${label}`);
      const level = add(row, "input", { ...range, step: 0.05, hidden: "", "aria-label": `Level of ${label}` });
      radio.addEventListener("change", () => choose(i));
      level.addEventListener("input", setGains); // while it moves
      level.addEventListener("change", draw); // once it rests
      return { radio, level };
    });
    rows[0].radio.checked = true;
    add(controls, "p", { class: "keys" }, `Keys: space plays, ← and → move by a second, 1 to ${last} choose a signal.`);

    const levels = () => rows.map(({ level }, i) => (mix.checked ? Number(level.value) : Number(i === chosen)));
    const now = () => Math.min(position + (voices.length && Math.max(context.currentTime - begun, 0)), duration);

    // The sum of the signals at their levels: channels.
    const mixed = () => [0, 1].map((channel) => {
      const sum = new Float32Array(signals[0].buffer.length);
      levels().forEach((level, i) => {
        const values = signals[i].channels[channel];
        if (level) for (let n = 0; n < sum.length; n++) sum[n] += level * values[n];
      });
      return sum;
    });

    // A mix that would clip is turned down as a whole.
    function gains() {
      const master = mix.checked ? Math.min(1, 0.99 / largest(mixed())) : 1;
      return levels().map((level) => master * level);
    }
    function setGains() {
      if (voices.length) gains().forEach((value, i) => voices[i].gain.gain.setTargetAtTime(value, context.currentTime, 0.005));
    }

    function draw() {
      title.textContent = `Spectrogram, 0 to ${TOP / 1000} kHz: ${mix.checked ? "your mix" : labels[chosen]}`;
      if (signals.length) paint(canvas, mix.checked ? spectrogram(mixed()) : signals[chosen].power, loudest);
    }

    function choose(i) {
      if (mix.checked) rows[i].level.value = Number(rows[i].level.value) ? 0 : 1;
      else rows[(chosen = i)].radio.checked = true;
      setGains();
      draw();
    }

    function show() {
      const time = STEADY.matches && voices.length ? Math.floor(now()) : now();
      seek.value = time;
      clock.textContent = `${time.toFixed(1)} of ${duration.toFixed(1)} s`;
      seek.setAttribute("aria-valuetext", `${Math.floor(time)} of ${Math.round(duration)} seconds`);
    }

    function tick() {
      frame = requestAnimationFrame(tick);
      if (now() >= duration) {
        pause();
        position = 0;
      }
      show();
    }

    function pause() {
      position = now();
      cancelAnimationFrame(frame);
      voices.forEach(({ source }) => source.stop());
      voices = [];
      button.textContent = "Play";
    }

    async function play() {
      context ||= new AudioContext({ sampleRate: RATE });
      await Promise.all([context.resume(), ready()]);
      if (voices.length || !signals.length) return;
      document.querySelectorAll("audio").forEach((audio) => audio.pause());
      active?.pause();
      active = { pause };
      begun = context.currentTime + 0.02;
      voices = gains().map((value, i) => {
        const source = new AudioBufferSourceNode(context, { buffer: signals[i].buffer }), gain = new GainNode(context, { gain: value });
        source.connect(gain).connect(context.destination);
        source.start(begun, position);
        return { source, gain };
      });
      button.textContent = "Pause";
      tick();
    }

    function move(time) {
      const playing = voices.length;
      if (playing) pause();
      position = Math.min(Math.max(time, 0), duration);
      show();
      if (playing) play();
    }

    async function decode() {
      const decoder = new OfflineAudioContext(2, 1, RATE), found = [];
      for (const audio of box.querySelectorAll("audio")) {
        const bytes = Uint8Array.from(atob(audio.src.split(",")[1]), (letter) => letter.charCodeAt(0));
        const buffer = await decoder.decodeAudioData(bytes.buffer);
        const channels = [0, buffer.numberOfChannels - 1].map((channel) => buffer.getChannelData(channel));
        found.push({ buffer, channels, power: spectrogram(channels) });
      }
      signals = found;
      loudest = largest(signals.map(({ power }) => power));
      duration = seek.max = signals[0].buffer.duration;
      draw();
      show();
    }
    const ready = () => (decoded ||= decode().catch(() => box.classList.remove("ready")));

    button.addEventListener("click", () => (voices.length ? pause() : play()));
    seek.addEventListener("input", () => move(Number(seek.value)));
    mix.addEventListener("change", () => {
      rows.forEach(({ radio, level }, i) => {
        [radio.hidden, level.hidden, level.value] = [mix.checked, !mix.checked, Number(i === chosen)];
      });
      setGains();
      draw();
    });
    controls.addEventListener("keydown", (event) => {
      const { key, target } = event, step = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (key >= "1" && key <= String(last)) choose(key - 1);
      else if (key === " " && target !== button && target !== mix) button.click();
      else if (step && [seek, button, mix].includes(target)) move(now() + step);
      else return;
      event.preventDefault();
    });

    draw();
    box.classList.add("ready");
    // Decoded when it comes near the window, so that a page with many players opens quickly.
    new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && ready(), { rootMargin: "400px" }).observe(box);
  }

  document.querySelectorAll(".stems").forEach(make);
  document.addEventListener("play", () => active?.pause(), true);
})();
